"""What people run: the `latentrelay` command, the demo, evaluation, reports. The only place to read the environment."""
