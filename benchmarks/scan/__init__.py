"""What a scan costs, what it finds, and whether its ranking of layers is true."""
