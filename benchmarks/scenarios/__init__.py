"""The scenarios: each module has `run(request, result)`, which fills `result` as it goes, so that a failure keeps what
was measured.
"""
