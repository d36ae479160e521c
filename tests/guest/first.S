# The smallest guest: entered through PVH (32-bit, unpaged), it writes '@' to COM1 and halts for good.
    .section .note.PVH, "a", @note
    .balign 4
    .long 4, 4, 18                  # sizes of name and description; XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start
    .text
    .code32
    .globl start
start:
    movw $0x3f8, %dx
    movb $'@', %al
    outb %al, %dx
    cli
halt:
    hlt
    jmp halt
