"""Bytes in flight: the frame codec and the two channels that carry it. `moeray.wire.channel` is the door."""
