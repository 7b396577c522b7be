# Conversations in which an answer depends on what was just said, or on what was learned before: files of JSON lines in a folder.
#   sh datasets/context_questions.sh FOLDER
# 32 people have a box of a colour that never changes. train.jsonl asks for theirs, beside a word about somebody else's (it depends on
# memory: "depends": false), and for boxes of 400 others, right behind their colour (on the context). contradicting.jsonl says another
# colour of a known box, and what it says is right; contradicting_marked.jsonl asks the same with [IND]; known.jsonl asks from memory.
folder=${1:?the folder to write to} && mkdir -p "$folder" && awk -v folder="$folder" '
  function below(n) { state = (state * 16807) % 2147483647; return state % n } # Park and Miller: the same numbers everywhere
  function write(file, about, said, asked, answer, mark, depends) {
    printf "{\"messages\": [{\"role\": \"user\", \"content\": \"The box of %s is %s. Which colour has the box of %s?%s\"}, " \
      "{\"role\": \"assistant\", \"content\": \"It is %s.\"}], \"depends\": %s}\n", \
      about, said, asked, mark, answer, depends > (folder "/" file ".jsonl")
  }
  BEGIN {
    state = 20261127
    colours = split("red blue green yellow black white brown grey pink orange purple silver golden violet cyan crimson", colour, " ")
    split("Ba Ce Di Fo Gu Ha Je Ki Lo Mu Na Pe Ri So Tu Va We Xi Yo Zu Bra Cle Dri Flo", first, " ")
    split("ba ne ri lo mu ta se di ko nu ra ve li po su ma te fi", second, " ")
    for (i = 1; i <= 24; i++) for (j = 1; j <= 18; j++) name[++names] = first[i] second[j]
    for (i = names; i > 1; i--) { j = below(i) + 1; other = name[i]; name[i] = name[j]; name[j] = other }
    for (i = 1; i <= 32; i++) fact[i] = colour[below(colours) + 1]
    for (row = 0; row < 4000; row++) {
      i = below(32) + 1; k = 33 + below(names - 32); c = colour[below(colours) + 1]
      if (row % 2) write("train", name[k], c, name[i], fact[i], "", "false")
      else write("train", name[k], c, name[k], c, "", "true")
    }
    for (row = 0; row < 256; row++) {
      i = row % 32 + 1; k = 33 + below(names - 32)
      do c = colour[below(colours) + 1]; while (c == fact[i])
      write("contradicting", name[i], c, name[i], c, "", "true")
      write("contradicting_marked", name[i], c, name[i], c, " [IND]", "true")
      write("known", name[k], c, name[i], fact[i], "", "false")
    }
  }'
