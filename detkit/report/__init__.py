"""What a run looks like: pictures and pages."""
