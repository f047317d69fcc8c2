"""What every conversion worker needs, imported once by the fork server they are forked from."""

import streaming  # noqa: F401

import dinocomp.data.part  # noqa: F401
