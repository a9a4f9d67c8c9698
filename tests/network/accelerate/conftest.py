"""Lets the tests of this folder import the networks beside them."""
