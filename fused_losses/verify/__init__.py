"""`fused-losses verify`: every example on every backend that can run here, against float64 truth.

A person with a new machine runs this first. The bound of a row is what roundings can do at its
inputs, whoever makes them: the float64 formula is run again with its roundings drawn anew
(`base/disturbance.py`), and a result may be four times as far from the truth as the largest of
these movements (sixteen times with narrowed products), and its own rounding. Movements are drawn
until it is within, at most 32.
"""
