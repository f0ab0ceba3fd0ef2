"""What a person looks at: grids, charts, model cards, the upload to the hub."""
