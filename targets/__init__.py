"""Device profiles, one TOML file each; read by `edgekit.target`."""
