"""What this machine has, what will therefore be used, and whether it works; also where parts are broken."""
