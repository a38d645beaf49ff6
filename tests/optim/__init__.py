"""Tests of tekfac_edu.optim against definitions worked out example by example, densely."""
