"""The sections of the config, a file each; `moeray.config` has the whole tree."""
