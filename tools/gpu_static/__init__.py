"""`make gpu-static`: what every GPU kernel compiles to, read from its machine code."""
