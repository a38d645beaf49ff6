"""Independent oracles for tekfac_edu.reference: one test file beside each of its modules."""
