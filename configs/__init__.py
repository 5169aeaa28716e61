"""Job files that run as they are; the quickstart among them is found here when the project is installed."""
