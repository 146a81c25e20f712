"""Statistics of each row's scores over all classes, the target apart."""
