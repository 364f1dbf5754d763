"""Many ranks that commit one checkpoint."""
