"""moeray: open-weight Mixture-of-Experts models, their experts served as Ray actors."""

__version__ = "0.1.0"
