"""What joins the stages: harvesting while training, reproducing a paper, the demo."""
