"""What `syncline bench` measures: the product's own parts beside references, in one run."""
