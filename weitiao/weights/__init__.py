"""Files on disk: fetched and verified, and looked into without loading them."""
