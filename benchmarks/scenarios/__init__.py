"""Each scenario has `run(request, result)`, which fills `result` as it goes: a failure keeps what was measured."""
