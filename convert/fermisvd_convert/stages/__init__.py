"""The stages of a conversion, one file each: a result that is kept in the workspace, and found there again."""
