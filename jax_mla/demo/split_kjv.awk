# Reads `bible -f "gen1:1-rev22:21"`; writes one verse a line and an empty line between chapters,
# four books to held_out.txt and the rest to train.txt.
{
  split($1, at, ":")
  held_out = at[1] ~ /^(Ruth|Jonah|Phi|Jas)[0-9]+$/
  file = held_out ? "held_out.txt" : "train.txt"
  if (at[1] != chapter[file]) { if (chapter[file] != "") print "" > file; chapter[file] = at[1] }
  sub(/^[^ ]+ +/, "")
  print > file
}
