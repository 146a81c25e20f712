"""Every row against every other, by kind of distance."""
