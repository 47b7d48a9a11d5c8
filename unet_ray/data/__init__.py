"""Images, masks and the way from files to rows."""
