"""What every Weighbridge daemon does alike: typed YAML settings, JSON journal, local HTTP port."""
