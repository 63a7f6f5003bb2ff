"""What verbs of the command line do beyond making stages."""
