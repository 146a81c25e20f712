"""The large-class head: its measured step, and a model of what a step costs a rank."""
