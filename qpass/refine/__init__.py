"""What changes a rounded model further on data: codes, scales, and the vectors that stay float."""
