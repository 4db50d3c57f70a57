"""Tables, pictures and one self-contained page of what runs wrote. Knows files, no models."""
