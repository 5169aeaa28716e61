"""What a run reports: metrics, rates, times and traces."""
