"""Weft inside other libraries: each module needs its library, an optional extra, imported when it is used."""
