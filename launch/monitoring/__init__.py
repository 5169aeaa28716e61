"""What a run tells of itself: metrics, rates, times and traces."""
