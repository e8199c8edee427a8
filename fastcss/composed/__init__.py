"""Each op composed of torch ops, without its big temporaries: what runs where nothing is compiled."""
