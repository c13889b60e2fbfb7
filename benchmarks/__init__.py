"""What lorafx costs, one command each. See docs/performance.md."""
