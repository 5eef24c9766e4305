"""`esm2kit split`: divide proteins into sets without similar pairs across them, and check sets that exist."""
