"""What heedful is compared with: one module a library."""
