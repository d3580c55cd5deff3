"""The experiment suite: stages whose results are kept under the hash of their configuration, experiments, and the report."""
