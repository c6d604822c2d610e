"""The bundled lab: tiny real models and problems that run through the same commands as any other."""
