"""Device profiles: one TOML file a device, a strict schema, and the catalogue that finds them.

`load_profile("galaxy-s24")`, `load_profile("mine", folder="profiles/")`, `load_profile("profiles/mine.toml")`.
"""

from latentrelay.device_profiles.catalogue import list_profiles, load_profile, validate_file
from latentrelay.device_profiles.errors import ProfileError, ProfileFileError, UnknownProfileError
from latentrelay.device_profiles.schema import SCHEMA_VERSION, DeviceProfile

__all__ = [
    "SCHEMA_VERSION",
    "DeviceProfile",
    "ProfileError",
    "ProfileFileError",
    "UnknownProfileError",
    "list_profiles",
    "load_profile",
    "validate_file",
]
