"""Tiles of classes folded by a rule: sub-centres, several labels a row, sigmoids."""
