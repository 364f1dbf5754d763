"""Benchmarks of async_ckpt beside other checkpoint writers; README.md has the recipe. Not installed."""
