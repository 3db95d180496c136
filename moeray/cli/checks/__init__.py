"""What `moeray doctor` looks at. A check is a function of facts that are handed to it; only `gather` looks them up."""
