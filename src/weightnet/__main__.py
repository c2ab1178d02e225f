"""`python -m weightnet` is the command `weightnet`."""

from weightnet.cli import app

app(prog_name="weightnet")
