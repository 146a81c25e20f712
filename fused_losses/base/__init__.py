"""The ground that every room stands on: torch alone, no primitive and no loss."""
