"""What every training method needs around it: a run that is opened, resumed, evaluated and saved, and plain training."""
