"""What every folder may use: errors, files, devices, the environment record, text formatting."""
