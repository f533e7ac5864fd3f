"""What hands a trained network on: the page to draw on, and other runtimes."""
