"""`fused-losses first-hour`: what to learn from the first minutes on a GPU, most valuable first.

A *unit* is one thing to learn: an op against float64, a case timed, a graph captured. Units run in
a process of their own, which may crash, hang or lose its device: the unit that it was in has then
failed, and a fresh process goes on with the next one. Each unit's result is a line of
`lines.jsonl`, written before the next unit begins, and `report.md` is made of these lines. A second
call with the same folder goes on where the first one stopped.
"""
