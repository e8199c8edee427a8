"""Composes each op of torch ops without big temporaries; these implementations run where nothing is compiled."""
