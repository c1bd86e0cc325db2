"""What goes into a model: data sets, the pipeline that feeds them, and their check-up."""
