"""What the project is measured by: cost, detection, the failure zoo. Not in the wheel; run from a checkout."""
